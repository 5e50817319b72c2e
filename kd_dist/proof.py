"""What an exported file is worth: how far it is from the student that it was made of, its metric, time and memory."""
