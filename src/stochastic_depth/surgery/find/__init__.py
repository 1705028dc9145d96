"""Group residual additions into blocks, and choose how each is made skippable."""
