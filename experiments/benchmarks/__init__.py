"""What the library costs: seconds, memory and compilation, alone and beside other libraries."""
