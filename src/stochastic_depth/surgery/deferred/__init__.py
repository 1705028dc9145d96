"""Skip a branch by deferring its calls: the addition returns its shortcut."""
