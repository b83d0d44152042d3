"""The detector family: configuration, network, matching, losses, boxes out, published weights.

What lives here: everything between a padded batch of images and its detections or losses.
It may import `cuda_ops`, torch, torchvision and scipy; never `pipeline`, `jobs` or `data_prep`.
"""
