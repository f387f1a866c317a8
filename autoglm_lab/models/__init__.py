"""What can be loaded: presets, anatomy, precision, placement, and the tri-modal architecture."""
