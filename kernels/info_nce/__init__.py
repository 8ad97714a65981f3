"""InfoNCE over nested dims: the public function (loss.py), its autograd function, and the backends behind it."""
