"""What things cost in time and memory: alternatives take turns within one process."""
