"""What a training computes, estimated before it runs."""
