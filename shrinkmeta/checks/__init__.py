"""What came in, checked: types, numbers, paths and optimisers, in words that name the argument."""
