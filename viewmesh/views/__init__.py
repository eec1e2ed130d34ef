"""Photos, masks, depth and cameras of one object, checked and brought to one form: the ViewSet."""
