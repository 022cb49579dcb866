"""What a run will take: operations, bytes a device, chips, compilation ahead of time."""
