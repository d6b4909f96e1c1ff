"""The page of `bitdance web`."""
