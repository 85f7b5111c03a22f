"""Sinusoids again: how many new observations lie in the intervals of Laplace's posterior?"""
