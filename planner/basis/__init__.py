"""What everything else stands on: errors, files, units, what is kept, loops that are compiled. It knows no plans."""
