"""Skip a branch by deferring its calls; while it is closed, the addition returns its shortcut."""
