"""Linear and generalised linear mixed models, fitted by the library as what they are."""
