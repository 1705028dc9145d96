"""What several test modules share: data sets written, networks, runs, processes."""
