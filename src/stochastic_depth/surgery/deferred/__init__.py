"""Skip a branch by putting it off: the addition gives its shortcut, and nothing asks for more."""
