"""Data sets, pretrained weights, run folders and pictures: what the three scripts share."""
