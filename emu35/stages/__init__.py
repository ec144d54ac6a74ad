"""The stages of training and release, one file each; a stage assembles its parts in sight."""
