"""Skip a branch by putting it off: closed, its addition gives the shortcut, and nothing asks for it."""
