"""Local attention kernels on one device; never imports dist_attn."""
