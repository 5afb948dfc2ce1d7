"""What every action and transfer of a plan costs: seconds and bytes."""
