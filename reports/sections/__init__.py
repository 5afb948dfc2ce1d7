"""The page's sections. Importing one registers it; this order is the page's."""

# isort: off
from reports.sections import verdict as verdict
from reports.sections import timeline as timeline
from reports.sections import memory as memory
from reports.sections import accuracy as accuracy
from reports.sections import plans as plans
from reports.sections import stages as stages
from reports.sections import assumptions as assumptions
