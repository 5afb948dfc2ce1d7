"""What a device can do and in which order: operations, schedules, ways of synchronising."""
