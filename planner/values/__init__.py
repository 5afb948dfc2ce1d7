"""What people write and read: clusters, profiles, plans, traces, outcomes."""
