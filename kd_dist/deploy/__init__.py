"""What an app developer gets beside the model: what it takes and gives, a model card, example code for Android."""
