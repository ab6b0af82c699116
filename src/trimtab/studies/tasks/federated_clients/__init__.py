"""Federations of images whose clients differ in more than how many of each class they hold."""
