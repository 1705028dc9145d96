"""What things cost in time, each measured against an alternative in turns within one process."""
