"""Experiments with `shrinkmeta`, written as a user of the library would write them."""
