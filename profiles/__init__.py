"""What a layer, a device and a link cost: measured on the real device through the executor's own code."""
