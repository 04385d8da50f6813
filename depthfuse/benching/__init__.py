"""The accelerated model beside every engine that a user could pick instead."""
