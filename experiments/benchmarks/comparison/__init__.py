"""Measurements that alternate with other settings or with other libraries."""
