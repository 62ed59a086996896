"""The model: backbones, deformable mixers, gating decoder, and DeGMix of all of them."""
