"""Adapters for languages: which kernels of a byte-level Transformer does a new language need?"""
