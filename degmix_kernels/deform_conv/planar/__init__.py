"""The planar path: few channels per offset group or per group, or both."""
