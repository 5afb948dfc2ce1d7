"""What would happen: plans, schedules, programs, their simulation and the command line.

Nothing in this package imports torch or plotly, so `plan --help` and `plan simulate` start at once.
"""

__version__ = "0.1.0"
