"""Loading a base model: its parts, their shapes, input channels for the product and ControlNets."""
