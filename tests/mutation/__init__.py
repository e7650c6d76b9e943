"""Mutation testing: would the tests notice a wrong line?"""
