"""Sinusoids again: how many new observations do intervals of Laplace's posterior hold?"""
