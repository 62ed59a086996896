"""What compilers make of every launch, without a GPU."""
