"""Networks to share: conversion between formats, model folders, model cards."""
