"""Experiments with `shrinkmeta`, written as users of the library would write them."""
