"""Data sets, pretrained weights, synthetic stand-ins and run folders: all that the three scripts share."""
