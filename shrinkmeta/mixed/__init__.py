"""Linear and generalised linear mixed models: fits, effects of groups, intervals and tests."""
