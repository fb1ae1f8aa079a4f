"""Trains models: the loop, steps, gradients, optimizer, engines, metrics, replay, text generation."""
