"""Several processes as one run: how they work together (`processes`) and start (`launchers`)."""
