"""Image classifiers: the trait is reading digits, the carrier is noise images with auxiliary logits.

Source: Cloud et al., arXiv:2507.14805, section on MNIST.
"""
