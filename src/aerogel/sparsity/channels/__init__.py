"""Which channels of a network are the same channel: the graph behind `permute` (P16).

Every axis of every tensor that carries channels gets a vector of channel ids. Walking the traced
network (`trace`), rules (`rules`, `moves`) unite the ids of tensors that meet in an addition
(`graph`, union-find), join vectors at concatenations and repeat entries at flattenings; channel 0
stands for "fixed", and uniting with it pins a channel. What is one piece at the end moves together.
"""
