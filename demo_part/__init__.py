"""A rendered product: a machined flange, normal and with six kinds of defect, in the layout of MVTec AD."""
