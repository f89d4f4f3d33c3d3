"""What the server and its batches cost, and whether they last."""
