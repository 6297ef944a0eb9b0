#!/bin/sh
# Run once, signed in to AWS as an administrator: the bucket, and the instance profiles that the
# nodes of the cluster get their credentials from. Rendered by `heliostat cluster render`.
set -eu
export AWS_PAGER="" AWS_DEFAULT_REGION={{ cluster.region }}
bucket={{ cluster.bucket }}
account=$(aws sts get-caller-identity --query Account --output text)

aws s3api create-bucket --bucket "$bucket"
{%- if cluster.region != "us-east-1" %} \
    --create-bucket-configuration LocationConstraint="$AWS_DEFAULT_REGION"
{%- endif %}

aws s3api put-public-access-block --bucket "$bucket" --public-access-block-configuration \
    BlockPublicAcls=true,IgnorePublicAcls=true,BlockPublicPolicy=true,RestrictPublicBuckets=true
aws s3api put-bucket-encryption --bucket "$bucket" --server-side-encryption-configuration \
    '{"Rules": [{"ApplyServerSideEncryptionByDefault": {"SSEAlgorithm": "AES256"}}]}'
# What an upload leaves that was never completed costs as much as an object, and nobody sees it.
aws s3api put-bucket-lifecycle-configuration --bucket "$bucket" --lifecycle-configuration \
    '{"Rules": [{"ID": "broken-uploads", "Status": "Enabled", "Filter": {},
                 "AbortIncompleteMultipartUpload": {"DaysAfterInitiation": 1}}]}'
aws s3api put-bucket-policy --bucket "$bucket" --policy \
    '{"Version": "2012-10-17", "Statement": [
      {"Sid": "OnlyTls", "Effect": "Deny", "Principal": "*", "Action": "s3:*",
       "Resource": ["arn:aws:s3:::{{ cluster.bucket }}", "arn:aws:s3:::{{ cluster.bucket }}/*"],
       "Condition": {"Bool": {"aws:SecureTransport": "false"}}}]}'

objects='{"Effect": "Allow", "Action": "s3:ListBucket",
  "Resource": "arn:aws:s3:::{{ cluster.bucket }}"},
 {"Effect": "Allow", "Resource": "arn:aws:s3:::{{ cluster.bucket }}/*",
  "Action": ["s3:GetObject", "s3:PutObject", "s3:DeleteObject", "s3:AbortMultipartUpload"]}'
# Workers are started in this region alone, and only what carries the cluster's name is ended.
workers='{"Effect": "Allow", "Resource": "*",
  "Action": ["ec2:Describe*", "ec2:RunInstances", "ec2:CreateTags", "ssm:GetParameters"],
  "Condition": {"StringEquals": {"aws:RequestedRegion": "{{ cluster.region }}"}}},
 {"Effect": "Allow", "Action": "ec2:TerminateInstances", "Resource": "*",
  "Condition": {"StringEquals": {"aws:ResourceTag/ray-cluster-name": "{{ cluster.name }}"}}},
 {"Effect": "Allow", "Action": "iam:PassRole",
  "Resource": "arn:aws:iam::'$account':role/{{ cluster.name }}-worker"}'

profile() { # name, statements
    aws iam create-role --role-name "$1" --assume-role-policy-document \
        '{"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "sts:AssumeRole",
          "Principal": {"Service": "ec2.amazonaws.com"}}]}'
    aws iam put-role-policy --role-name "$1" --policy-name heliostat --policy-document \
        '{"Version": "2012-10-17", "Statement": ['"$2"']}'
    aws iam create-instance-profile --instance-profile-name "$1"
    aws iam add-role-to-instance-profile --instance-profile-name "$1" --role-name "$1"
}
{% if nodes | selectattr("spot") | list %}
# Whoever asks for spot capacity first would need the right to make it.
aws iam create-service-linked-role --aws-service-name spot.amazonaws.com || true
{% endif %}
profile {{ cluster.name }}-worker "$objects"
profile {{ cluster.name }}-head "$objects, $workers"
