"""Several processes as one run: what they agree on (`processes`), how they find each other."""
